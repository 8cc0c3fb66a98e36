"""From images to a verified bundle: the stages of `saae-export build`."""
