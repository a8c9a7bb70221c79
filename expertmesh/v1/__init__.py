"""Generated from protos/expertmesh/v1 by `make proto`; do not edit."""
