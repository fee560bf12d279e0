// The view Inside.
export function mount() {}
