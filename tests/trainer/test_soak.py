"""A run that is killed again and again ends with the weights of one that was left alone."""

from support.soak import soak


def test_killed_runs_go_on_alone_and_end_with_the_same_weights(tmp_path):
    """Three kills, one of them at least within a save, and a disk that is full once: make soak has
    twenty.
    """
    assert soak(tmp_path, num_kills=3, seed=1) >= 1
