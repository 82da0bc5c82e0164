"""Parts of a 3D mesh: views from cameras around it, and the faces' parts from the parts of the views."""
