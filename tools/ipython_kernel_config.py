# `make setup` puts it into etc/ipython of the environment: every notebook kernel there loads the extension at its start
c = get_config()  # noqa: F821 (IPython's)
c.InteractiveShellApp.extra_extensions.append("vdm_utils.hints")
