"""Generalized JSD in the teacher's vocabulary, into which the student is projected."""
