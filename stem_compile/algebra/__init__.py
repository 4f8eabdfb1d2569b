"""What an attention means, apart from any graph or device: index arithmetic, masks, scores, blocks."""
