"""A teacher that a vLLM server runs: what it is asked, what it answers, and what is done here."""
