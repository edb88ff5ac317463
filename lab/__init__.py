"""The laboratory: what is ours and not the paper's, and the machinery. The paper itself is the seven files above."""
