"""What the rooms that answer HTTP share: refusals, bodies, events, pages."""
