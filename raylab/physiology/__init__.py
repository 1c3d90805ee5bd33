"""Virtual patients: a lung with many compartments under a ventilator, vectorised over patients. docs/physiology.md.

parameters   every input with its unit and range
blood        gases in blood: saturation, contents, pH
mechanics    pressures, recruitment, mechanical power
exchange     compartments, shunt and venous blood as one system of equations, and its solver
steady       settings and patient -> steady-state gases and pressures
course       the same through time, as settings change
"""
