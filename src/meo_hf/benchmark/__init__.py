"""Count and measure what MEO models cost."""
