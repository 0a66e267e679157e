"""How good the bundled model's videos are under every policy, at equal live tokens."""
