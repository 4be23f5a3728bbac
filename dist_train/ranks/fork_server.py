"""The fork server of the ranks imports this first: it ends with its launcher, and its ranks with it."""

from dist_train.ranks.parent import die_with_parent

die_with_parent()
