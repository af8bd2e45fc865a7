"""What the programs of tests/trust share: scenes, commands, injected faults, figures."""
