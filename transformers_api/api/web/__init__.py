"""The page: a browser's files, without a build step; ``static/js/app.js`` wires them."""
