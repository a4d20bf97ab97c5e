"""Image-text and video-text retrieval: data sets, encoders, models, losses, training, evaluation."""
