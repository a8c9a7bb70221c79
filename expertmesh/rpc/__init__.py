"""How clients and services talk: addresses, channels, servers, streams, deadlines, errors."""
