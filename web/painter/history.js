// @ts-check
/** Undo and redo over saved states. No DOM in here. */

/** @template T */
export class History {
  /** @param {T} state @param {number} [limit] */
  constructor(state, limit = 50) {
    this.limit = limit;
    this.states = [state];
    this.index = 0;
  }

  /** @param {T} state */
  reset(state) {
    this.states = [state];
    this.index = 0;
  }

  get present() {
    return this.states[this.index];
  }

  /** @param {T} state what is now; equal to the present one it is not stored */
  push(state) {
    if (state === this.present) return;
    this.states.splice(this.index + 1, Infinity, state);
    if (this.states.length > this.limit) this.states.shift();
    this.index = this.states.length - 1;
  }

  /** @returns {T | undefined} the state before, undefined at the first */
  undo() {
    return this.index > 0 ? this.states[--this.index] : undefined;
  }

  /** @returns {T | undefined} */
  redo() {
    return this.index < this.states.length - 1 ? this.states[++this.index] : undefined;
  }
}
