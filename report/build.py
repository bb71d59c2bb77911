import sys, pathlib
p=pathlib.Path(sys.argv[1])/"report"; p.mkdir(exist_ok=True); (p/"index.html").write_text("x")
