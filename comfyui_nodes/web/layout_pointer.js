// What the mouse or a pen does in the Layout Editor: select, move, scale, turn, draw boxes, add.

import {area, contains, frameOf, rotation, stretch} from "./gaussian_geometry.js";

const CLICK_PX = 3; // a pointer that moves less has clicked
const HANDLE_PX = 9; // how near to a handle counts
const THIN_PX = 3; // how near to an ellipse counts
const SMALLEST_FACTOR = 0.02;
const TURN_STEP = Math.PI / 12; // with Shift

const MOVE = [1, 0, 0, 1];
const RESIZE_CURSORS = ["ew-resize", "nwse-resize", "ns-resize", "nesw-resize"];

export class LayoutPointer {
    /**
     * @param view the LayoutView.
     * @param state the LayoutState.
     * @param changed called after everything that is to be seen; its argument tells whether only the selection moved.
     */
    constructor(view, state, changed) {
        this.view = view;
        this.state = state;
        this.changed = changed;
        this.hover = null;
        this.drag = null;
        const canvas = view.canvas;
        canvas.addEventListener("pointerdown", (event) => this._down(event));
        canvas.addEventListener("pointermove", (event) => this._move(event));
        canvas.addEventListener("pointerup", (event) => this._up(event));
        canvas.addEventListener("pointercancel", () => this.cancel());
        canvas.addEventListener("pointerleave", () => this._hoverOver(null));
        canvas.addEventListener("dblclick", (event) => this._add(event));
    }

    /** The frame of the selection, as the drag has turned and stretched it. */
    get frame() {
        if (this.drag?.frame) return this.drag.frame;
        return frameOf(this.state.selection().map((item) => item.gaussian));
    }

    /** The box that is being drawn, or null. */
    get box() {
        return this.drag?.kind === "box" && this.drag.far ? [...this.drag.start, ...this.drag.now] : null;
    }

    /** Ends a drag as if it had not been. */
    cancel() {
        if (!this.drag) return false;
        const {originals, before} = this.drag;
        for (const [item, gaussian, edited] of originals ?? []) Object.assign(item, {gaussian, edited});
        if (before) this.state.selected = before;
        this.drag = null;
        this.changed(false);
        return true;
    }

    /** Lets go of Gaussians that are no longer there. */
    forget() {
        this.drag = this.hover = null;
    }

    _down(event) {
        if (event.button !== 0 || !this.state.editable) return;
        event.preventDefault();
        event.stopPropagation();
        this.view.canvas.setPointerCapture(event.pointerId);
        const start = this.view.eventPoint(event), {state} = this, before = new Set(state.selected);
        const handle = event.shiftKey ? null : this._handleAt(...start);
        if (handle) {
            this._begin({kind: handle.kind, handle, start, frame: this.frame, whole: this.frame});
            return;
        }
        const hit = this._itemAt(...start);
        // A large selected ellipse can be dragged by any part of it, also where small ones lie on top.
        const inSelection = state.selection().some((item) => this._reaches(item, ...start));
        const between = !hit && state.selected.size > 1 && this._inFrame(...start);
        if ((hit || between) && !event.shiftKey) {
            if (!inSelection && !between) state.selected = new Set([hit]);
            this._begin({kind: "move", hit, start, before});
        } else {
            // With Shift a box can begin on an ellipse, too: in most pictures they leave little space between them.
            if (!event.shiftKey) state.selected = new Set();
            this.drag = {kind: "box", hit, start, now: start, before, kept: new Set(state.selected), far: false};
        }
        this.changed(false);
    }

    _begin(drag) {
        const originals = this.state.selection().map((item) => [item, item.gaussian, item.edited]);
        this.drag = {...drag, originals, far: false};
    }

    _move(event) {
        const point = this.view.eventPoint(event), {drag} = this;
        if (!drag) {
            this._hoverOver(this.state.editable ? this._itemAt(...point) : null);
            this._showCursor(point);
            return;
        }
        const slack = CLICK_PX * this.view.unit;
        drag.far ||= Math.hypot(point[0] - drag.start[0], point[1] - drag.start[1]) > slack;
        if (!drag.far) return;
        drag.now = point;
        if (drag.kind === "move") this._dragMove(drag, point, event.shiftKey);
        if (drag.kind === "scale") this._dragScale(drag, point);
        if (drag.kind === "rotate") this._dragRotate(drag, point, event.shiftKey);
        if (drag.kind === "box") this._dragBox(drag);
        this.changed(drag.kind !== "box");
    }

    _dragMove({start, originals}, point, straight) {
        const {scale} = this.view.layout();
        let dx = (point[0] - start[0]) / scale, dy = (point[1] - start[1]) / scale;
        if (straight) [dx, dy] = Math.abs(dx) > Math.abs(dy) ? [dx, 0] : [0, dy];
        this.state.transform(originals, MOVE, 0, 0, dx, dy);
    }

    /** Sides stretch along one axis, corners keep the shape; all about the middle. */
    _dragScale(drag, point) {
        const {handle, whole, originals, start} = drag, {view} = this;
        const [x, y] = view.toCanvas(whole.x, whole.y), cos = Math.cos(whole.angle), sin = Math.sin(whole.angle);
        const inFrame = ([px, py]) => [(px - x) * cos + (py - y) * sin, (py - y) * cos - (px - x) * sin];
        const [fromX, fromY] = inFrame(start), [toX, toY] = inFrame(point);
        const along = (to, from) => Math.max(SMALLEST_FACTOR, from ? to / from : 1);
        let factorX = handle.u ? along(toX, fromX) : 1, factorY = handle.v ? along(toY, fromY) : 1;
        if (handle.u && handle.v) {
            const length = Math.hypot(fromX, fromY);
            factorX = factorY = along((toX * fromX + toY * fromY) / length, length);
        }
        drag.frame = {...whole, halfX: whole.halfX * factorX, halfY: whole.halfY * factorY};
        this.state.transform(originals, stretch(factorX, factorY, whole.angle), whole.x, whole.y);
    }

    _dragRotate(drag, point, inSteps) {
        const {whole, originals, start} = drag, [x, y] = this.view.toCanvas(whole.x, whole.y);
        let angle = Math.atan2(point[1] - y, point[0] - x) - Math.atan2(start[1] - y, start[0] - x);
        if (inSteps) angle = Math.round(angle / TURN_STEP) * TURN_STEP;
        drag.frame = {...whole, angle: whole.angle + angle};
        this.state.transform(originals, rotation(angle), whole.x, whole.y);
    }

    _dragBox({start, now, kept}) {
        const [x0, y0] = this.view.toPicture(Math.min(start[0], now[0]), Math.min(start[1], now[1]));
        const [x1, y1] = this.view.toPicture(Math.max(start[0], now[0]), Math.max(start[1], now[1]));
        const inside = ({gaussian: {x, y}}) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
        this.state.selected = new Set([...kept, ...this.state.items.filter(inside)]);
    }

    _up(event) {
        const {drag, state} = this;
        if (!drag || event.button !== 0) return;
        event.stopPropagation();
        this.drag = null;
        if (!drag.far) this._click(drag);
        else if (drag.kind !== "box") state.commit();
        this.changed(false);
    }

    _click({kind, hit, kept}) {
        if (kind === "move") this.state.selected = new Set(hit ? [hit] : []);
        if (kind !== "box" || !hit) return;
        this.state.selected = new Set(kept);
        if (!this.state.selected.delete(hit)) this.state.selected.add(hit);
    }

    /** A copy of the token under the pointer, or the nearest one, comes to the pointer. */
    _add(event) {
        if (!this.state.editable) return;
        event.preventDefault();
        event.stopPropagation();
        const point = this.view.eventPoint(event), [x, y] = this.view.toPicture(...point);
        const source = this._itemAt(...point) ?? this.state.nearest(x, y);
        if (!source || this._handleAt(...point)) return;
        this.state.add([source], x - source.gaussian.x, y - source.gaussian.y);
        this.changed(false);
    }

    _reaches({gaussian}, x, y) {
        const {scale} = this.view.layout();
        return contains(gaussian, ...this.view.toPicture(x, y), (THIN_PX * this.view.unit) / scale);
    }

    _inFrame(x, y) {
        const corners = this.view.handles(this.frame).filter(({u, v}) => Math.abs(u * v) === 1);
        const [first, , last] = corners; // of several Gaussians the frame is upright
        return x > first.x && x < last.x && y > first.y && y < last.y;
    }

    /** The smallest Gaussian at a point of the canvas, or null. */
    _itemAt(x, y) {
        let best = null, least = Infinity;
        for (const item of this.state.items) {
            const size = area(item.gaussian);
            if (size < least && this._reaches(item, x, y)) [best, least] = [item, size];
        }
        return best;
    }

    _handleAt(x, y) {
        const {frame} = this;
        if (!frame) return null;
        // Small ellipses have handles all around, but can be moved by their middle.
        const [middleX, middleY] = this.view.toCanvas(frame.x, frame.y);
        let best = null, least = Math.min(HANDLE_PX * this.view.unit, Math.hypot(middleX - x, middleY - y));
        for (const handle of this.view.handles(frame)) {
            const distance = Math.hypot(handle.x - x, handle.y - y);
            if (distance < least) [best, least] = [handle, distance];
        }
        return best;
    }

    _hoverOver(item) {
        if (item === this.hover) return;
        this.hover = item;
        this.changed(true);
    }

    _showCursor(point) {
        const handle = this.state.editable ? this._handleAt(...point) : null;
        let cursor = this.hover ? "move" : "crosshair";
        if (handle?.kind === "rotate") cursor = "grab";
        if (handle?.kind === "scale") {
            const angle = Math.atan2(handle.v, handle.u) + this.frame.angle;
            cursor = RESIZE_CURSORS[(Math.round(angle / (Math.PI / 4)) + 8) % 4];
        }
        this.view.canvas.style.cursor = cursor;
    }
}
