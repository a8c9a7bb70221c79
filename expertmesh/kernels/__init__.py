"""Code for CPUs that is made while a service starts: what the services' own kernels share."""
