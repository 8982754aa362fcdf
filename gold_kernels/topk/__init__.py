"""A teacher of whom the k likeliest tokens are known: from a server, or a file."""
