"""raylab: elastic training and tuning of medical deep-learning models on Ray and Slurm."""

__version__ = "0.1.0"
