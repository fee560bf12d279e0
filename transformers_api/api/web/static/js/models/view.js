// The view Models.
export function mount() {}
