import sys

from vllm_lrqk.evaluation.attention import main

main(sys.argv[1:])
