"""Fields of GOLDConfig, a file a subject, and what is checked of them before anything is loaded."""
