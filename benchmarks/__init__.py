"""How fast is each stage, and how fast could it be? `python -m benchmarks`; see README.md."""
