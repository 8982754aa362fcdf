"""vLLM as the writer: a server, or an engine in each process."""
