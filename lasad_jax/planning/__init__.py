"""What a training step needs, known before a machine is paid for."""
