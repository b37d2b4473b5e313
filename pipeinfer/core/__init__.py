"""What all other layers share: messages, ports, errors, configuration. Standard library and numpy only."""
