"""The router: gate, plan, fan out, combine."""
