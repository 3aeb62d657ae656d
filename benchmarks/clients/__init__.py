"""Models that bitwright quantized, in the programs that others run them with; see `benchmarks/clients.sh`."""
