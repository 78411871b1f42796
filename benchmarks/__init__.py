"""fastmae.benchmarks: how fast, beside what, on which machine. One question a file; run by ``fastmae bench``."""
