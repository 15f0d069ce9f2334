"""What a step became, in words and tables."""

from jaxpar.show.plan import explain_step as explain_step
