"""Generalized JSD in the teacher's vocabulary, into which the student's distribution is projected."""
