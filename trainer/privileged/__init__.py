"""A teacher that sees more than the student: other pictures, or another context."""
