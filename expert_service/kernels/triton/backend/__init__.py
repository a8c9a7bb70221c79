"""The backend around the kernels: resident weights, recorded graphs, overlapped copies."""
