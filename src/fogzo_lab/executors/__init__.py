"""Where calls are computed: in processes here, on a Ray cluster, or as jobs of Slurm."""
