"""What bench_quality.py is made of: pictures, models, their schooling, rows of the table, runs."""
