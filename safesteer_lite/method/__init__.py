"""The method of SafeSteer (arXiv 2606.02530): tensors in, tensors out."""
