"""What each layer says, looks at and routes to; base beside adapter."""
