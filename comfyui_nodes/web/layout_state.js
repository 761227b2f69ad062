// The Gaussians that the Layout Editor shows, what was done to them, and the way back.
//
// The text is a state, not a list of operations; comfyui_nodes/layout_edits.py reads it and says what it means.

import {area, fromPixels, toPixels, transformed} from "./gaussian_geometry.js";

const VERSION = 2;
const UNDO_STEPS = 200;
const NO_EDITS = {changed: {}, deleted: [], added: []};

/** An item is {base, from, gaussian, edited}: base is the token's index, or null for an added one; from its source. */
export class LayoutState {
    constructor() {
        this.geometry = null; // of the tokens as they came: [sigma_x, sigma_y, rho, x, y], or null for deleted ones
        this.canvasSize = null;
        this.fingerprint = null; // of the layout, by the node; edits carry it
        this.misfit = null; // why the text is not for these tokens, "number" or "layout"; such text is kept, not applied
        this.text = "";
        this.items = [];
        this.selected = new Set();
        this._undo = [];
        this._redo = [];
    }

    /** Takes what the node has shown. Edits and the history stay, whatever it is: each text knows its own layout. */
    setTokens(geometry, canvasSize, fingerprint) {
        const selected = String(fingerprint) === String(this.fingerprint) ? this.selectedNames() : [];
        this.geometry = geometry;
        this.canvasSize = canvasSize;
        this.fingerprint = fingerprint;
        this._rebuild(selected);
    }

    /** Whether there are tokens, and the text is for them: else editing would write over it. */
    get editable() {
        return this.geometry !== null && this.misfit === null;
    }

    /** Takes text from outside, such as that of a workflow that was opened. */
    setText(text) {
        if (text === this.text) return;
        this.text = text;
        this._forget();
        this._rebuild([]);
    }

    get canUndo() {
        return this._undo.length > 0;
    }

    get canRedo() {
        return this._redo.length > 0;
    }

    undo() {
        this._travel(this._undo, this._redo);
    }

    redo() {
        this._travel(this._redo, this._undo);
    }

    reset() {
        this._remember(this.selectedNames());
        this.text = "";
        this._rebuild([]);
    }

    /** Takes edits of another layout for edits of this one. */
    adopt() {
        this._remember([]);
        this.text = JSON.stringify({...this._parsed(), version: VERSION, fingerprint: this.fingerprint});
        this._rebuild([]);
    }

    /** The selected items. */
    selection() {
        return this.items.filter((item) => this.selected.has(item));
    }

    /** Applies a linear map about a point to Gaussians as they were when a drag began: [[item, gaussian], ...]. */
    transform(originals, matrix, px, py, dx = 0, dy = 0) {
        for (const [item, original] of originals) {
            const moved = transformed(original, matrix, px, py);
            moved.x += dx;
            moved.y += dy;
            // Through the bounds and digits of the text, so that what is seen is what will be.
            item.gaussian = toPixels(fromPixels(moved, this.canvasSize), this.canvasSize);
            item.edited = true;
        }
    }

    /** Shifts the selection by pixels. */
    nudge(dx, dy) {
        this.transform(this.selection().map((item) => [item, item.gaussian]), [1, 0, 0, 1], 0, 0, dx, dy);
        this.commit();
    }

    deleteSelected() {
        if (this.selected.size === 0) return;
        const names = this.selectedNames();
        this.items = this.items.filter((item) => !this.selected.has(item));
        this.selected.clear();
        this.commit(names);
    }

    /** Adds copies of items, shifted by pixels, and selects them. */
    add(sources, dx, dy) {
        const names = this.selectedNames(), copies = sources.map(({from, gaussian}) => ({base: null, from, gaussian, edited: true}));
        this.transform(copies.map((item) => [item, item.gaussian]), [1, 0, 0, 1], 0, 0, dx, dy);
        this.items.push(...copies);
        this.selected = new Set(copies);
        this.commit(names);
    }

    /** The item whose centre lies nearest to a point, or null. */
    nearest(px, py) {
        let best = null, least = Infinity;
        for (const item of this.items) {
            const distance = Math.hypot(item.gaussian.x - px, item.gaussian.y - py);
            if (distance < least) [best, least] = [item, distance];
        }
        return best;
    }

    /** Items from large to small, in which order they are drawn: small ones are on top. */
    bySize() {
        return [...this.items].sort((one, other) => area(other.gaussian) - area(one.gaussian));
    }

    /** Ends a change: writes the text, and remembers the one before with what was selected then. */
    commit(names = this.selectedNames()) {
        if (!this.editable) return;
        const text = this._serialised();
        if (text === this.text) return;
        this._remember(names);
        this.text = text;
    }

    /** {changed, deleted, added}: how many tokens, also where the tokens themselves are not known yet. */
    counts() {
        const edits = this._parsed();
        return {
            changed: Object.keys(edits.changed).length, deleted: edits.deleted.length, added: edits.added.length,
        };
    }

    /** Names that outlive `_rebuild`: a token's index, or "+" and the place among the added ones. */
    selectedNames() {
        let place = 0;
        const names = [];
        for (const item of this.items) {
            const name = item.base ?? `+${place++}`;
            if (this.selected.has(item)) names.push(name);
        }
        return names;
    }

    _findMisfit({num_tokens: count, fingerprint}) {
        if (count === undefined) return null;
        if (count !== this.geometry.length) return "number";
        // Text of version 1 has none. The node allows for rounding and shows the one that fitting edits carry.
        return fingerprint && String(fingerprint) !== String(this.fingerprint) ? "layout" : null;
    }

    _forget() {
        this._undo = [];
        this._redo = [];
    }

    _remember(names) {
        this._undo.push([this.text, names]);
        if (this._undo.length > UNDO_STEPS) this._undo.shift();
        this._redo = [];
    }

    _travel(from, to) {
        if (from.length === 0) return;
        to.push([this.text, this.selectedNames()]);
        const [text, names] = from.pop();
        this.text = text;
        this._rebuild(names);
    }

    /** The text as an object; text that makes no sense counts as none here: the node says what is wrong with it. */
    _parsed() {
        try {
            return {...NO_EDITS, ...JSON.parse(this.text)};
        } catch {
            return NO_EDITS;
        }
    }

    _rebuild(selectedNames) {
        this.items = [];
        this.selected = new Set();
        this.misfit = null;
        if (!this.geometry) return;
        const parsed = this._parsed();
        this.misfit = this._findMisfit(parsed);
        const edits = this.misfit ? NO_EDITS : parsed;
        const deleted = new Set(edits.deleted), names = new Set(this.misfit ? [] : selectedNames);
        const include = (name, item) => {
            this.items.push(item);
            if (names.has(name)) this.selected.add(item);
        };
        this.geometry.forEach((original, base) => {
            if (!original || deleted.has(base)) return;
            const changed = edits.changed[base];
            const gaussian = toPixels(changed ?? original, this.canvasSize);
            include(base, {base, from: base, gaussian, edited: changed !== undefined});
        });
        edits.added.forEach(({from, geometry}, place) => {
            include(`+${place}`, {base: null, from, gaussian: toPixels(geometry, this.canvasSize), edited: true});
        });
    }

    _serialised() {
        const changed = {}, added = [], there = new Set();
        for (const {base, from, gaussian, edited} of this.items) {
            there.add(base);
            if (base === null) {
                added.push({from, geometry: fromPixels(gaussian, this.canvasSize)});
            } else if (edited) {
                const geometry = fromPixels(gaussian, this.canvasSize);
                if (geometry.some((number, channel) => number !== this.geometry[base][channel])) changed[base] = geometry;
            }
        }
        const deleted = [...this.geometry.keys()].filter((base) => this.geometry[base] && !there.has(base));
        if (Object.keys(changed).length + deleted.length + added.length === 0) return "";
        const made = {version: VERSION, num_tokens: this.geometry.length, fingerprint: this.fingerprint};
        return JSON.stringify({...made, changed, deleted, added});
    }
}
