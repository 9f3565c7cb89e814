"""Steps of few shapes, compiled or captured as CUDA graphs: what all ways to sample run on."""
