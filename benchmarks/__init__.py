"""How fast and how small this is: ratios against the plain library model and the slow oracle, and whole runs of run.py.

bash scripts/bench.sh        # on the CPU  -> benchmarks/cpu.json, cpu.md
bash scripts/bench_gpu.sh    # on a GPU, in pieces that can be continued  -> results/gpu/*.json, gpu.md
"""
