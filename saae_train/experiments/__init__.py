"""Many fits: experiments, tables, the paper's figures, speed."""
