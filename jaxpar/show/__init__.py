"""Pictures and text of what jaxpar makes."""

from jaxpar.show.plan import explain_step as explain_step
from jaxpar.show.terminal import render_timetable as render_timetable
from jaxpar.show.timetable import draw_timetable as draw_timetable
from jaxpar.show.trace import chrome_trace as chrome_trace
