// The page's part of the node GPS Layout Editor: a widget that shows Gaussians and lets people edit them.
//
// The widget `edits` is the one truth: workflows carry its value, and the editor draws it. The editor writes to it only
// when the user has done something, and reads it before; laying out, resizing or restoring a node never writes. What the
// Gaussians are comes with each run. ComfyUI imports every script of this folder; only this one registers anything.

import {api} from "../../scripts/api.js";
import {app} from "../../scripts/app.js";
import {LayoutPointer} from "./layout_pointer.js";
import {LayoutState} from "./layout_state.js";
import {LayoutView} from "./layout_view.js";

const NODE = "GPSLayoutEditor";
const EDITS = "edits";
const NODE_SIZE = [460, 570];
const MIN_HEIGHT = 240;
const VUE_HEIGHT = 480;
const NUDGE_PX = 1, LONG_NUDGE_PX = 10;
const COPY_SHIFT_PX = 6; // on the screen: where copies by the button lie

const NOTICES = {
    number: "The edits were made for another number of tokens. Bring that layout back, or press Reset.",
    layout: "The edits were made on another layout. Bring that one back, press Reset, or:",
};

const STYLE = `
.gps-layout { display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%; box-sizing: border-box;
    font: 12px/1.3 Inter, Arial, sans-serif; color: var(--input-text, #ddd); }
[data-node-id] .gps-layout { min-height: ${VUE_HEIGHT}px; } /* Nodes 2.0 give a widget the height of what is in it */
.gps-layout-tools { display: flex; flex-wrap: wrap; gap: 4px; flex: none; }
.gps-layout-tools .gps-layout-gap { flex: 1; }
.gps-layout button { display: inline-flex; align-items: center; gap: 5px; height: 26px; padding: 0 8px; font: inherit;
    color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); cursor: pointer; white-space: nowrap;
    border: 1px solid var(--border-color, #4e4e4e); border-radius: 5px; }
.gps-layout button:hover:enabled { border-color: var(--p-primary-color, #1f6feb); }
.gps-layout button:focus-visible { outline: 2px solid var(--p-primary-color, #1f6feb); outline-offset: 1px; }
.gps-layout button:disabled { opacity: 0.4; cursor: default; }
.gps-layout svg { width: 14px; height: 14px; fill: none; stroke: currentColor; stroke-width: 1.6;
    stroke-linecap: round; stroke-linejoin: round; }
.gps-layout-stage { position: relative; flex: 1; min-height: 0; overflow: hidden; border-radius: 6px;
    border: 1px solid var(--border-color, #4e4e4e); background: #101116; }
.gps-layout-stage:focus-within { border-color: var(--p-primary-color, #1f6feb); }
.gps-layout-stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; }
.gps-layout-stage textarea { position: absolute; width: 1px; height: 1px; padding: 0; border: 0; opacity: 0;
    resize: none; pointer-events: none; }
.gps-layout-hint { position: absolute; inset: 0; display: grid; place-items: center; padding: 24px; text-align: center;
    color: #a9adb8; pointer-events: none; }
.gps-layout-notice { position: absolute; left: 8px; right: 8px; top: 8px; display: flex; align-items: center; gap: 10px;
    padding: 6px 8px; border-radius: 5px; border: 1px solid #c98a1b; color: #ffe2ae; background: rgba(46, 32, 6, 0.92); }
.gps-layout-notice span { flex: 1; }
.gps-layout-hint[hidden], .gps-layout-notice[hidden], .gps-layout-notice button[hidden] { display: none; }
.gps-layout-status { display: flex; justify-content: space-between; gap: 0 12px; flex: none; flex-wrap: wrap;
    height: 16px; overflow: hidden; white-space: nowrap; } /* a tip that does not fit wraps out of sight */
.gps-layout-status span { overflow: hidden; text-overflow: ellipsis; }
.gps-layout-status .gps-layout-counts { flex: none; max-width: 100%; font-variant-numeric: tabular-nums; }
.gps-layout-status .gps-layout-tip { color: var(--descrip-text, #999); }
`;

const ICONS = {
    add: "M8 3v10M3 8h10",
    delete: "M3 4.5h10M6.5 4.5v-1.5h3v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5M6.8 7v3.5M9.2 7v3.5",
    undo: "M6 3.5 3 6.5l3 3M3 6.5h6a3.5 3.5 0 0 1 0 7H7",
    redo: "M10 3.5l3 3-3 3M13 6.5H7a3.5 3.5 0 0 0 0 7h2",
    adopt: "M3 8.5l3.5 3.5L13 4.5",
    reset: "M13 8a5 5 0 1 1-1.6-3.7M13 2.5v3h-3",
};

function element(tag, className, properties = {}) {
    return Object.assign(document.createElement(tag), {className, ...properties});
}

class LayoutEditor {
    /** @param node the node of the graph; it has the widget `edits`. */
    constructor(node) {
        this.node = node;
        this.edits = node.widgets.find((widget) => widget.name === EDITS);
        this._hide(this.edits);
        this.state = new LayoutState();
        this._build();
        this.view = new LayoutView(this.canvas);
        this.pointer = new LayoutPointer(this.view, this.state, (moving) => this._write(moving));
        this.root.addEventListener("keydown", (event) => this._key(event));
        this._leaveToGraph();
        this.shown = null;
        this._seen = ""; // the widget's text when it was last read or written
        this._full = this._stale = true;
        this._observer = new ResizeObserver(() => this._redraw());
        this._observer.observe(this.stage);
        this.widget = node.addDOMWidget("layout_editor", "GPS_LAYOUT_EDITOR", this.root, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => MIN_HEIGHT,
        });
        this.widget.serialize = false;
        // The properties panel leaves its own width here, and the graph would keep to it.
        Object.defineProperty(this.widget, "width", {get: () => undefined, set: () => {}});
        const frame = () => {
            this._frame = requestAnimationFrame(frame);
            this._look();
            this._draw();
        };
        frame();
    }

    /** Takes what the node has shown. */
    show(shown) {
        this.shown = shown;
        this.view.imageSize = shown.image_size;
        this._read();
        this.state.setTokens(shown.geometry, shown.canvas_size, shown.fingerprint);
        this.view.background = null;
        if (shown.background) {
            // A temporary picture, gone after a restart: the ellipses are of use without it.
            const image = new Image();
            image.onload = () => {
                if (this.shown !== shown) return;
                this.view.background = image;
                this._redraw();
            };
            image.src = api.apiURL(`/view?${new URLSearchParams(shown.background)}`);
        }
        this._redraw();
    }

    remove() {
        this._observer.disconnect();
        cancelAnimationFrame(this._frame);
    }

    // ---- what the page does ----

    /**
     * Once a frame: text from outside, outputs of before the node was made anew, and zoom. Frames of our own, since
     * Nodes 2.0 never call a widget's onDraw, and some ways of writing a widget's value call nothing of the widget.
     */
    _look() {
        this._takePlace();
        this._read();
        const known = this.shown ? null : app.nodeOutputs?.[locator(this.node)]?.layout_editor?.[0];
        if (known) this.show(known);
        if (this.view.zoom !== this._zoom) this._redraw();
    }

    /** ComfyUI's undo makes nodes anew, and Nodes 2.0 then keep showing the widget of the node that is gone. */
    _takePlace() {
        if (this.root.isConnected || app.canvas?.graph !== this.node.graph) return;
        document.querySelector(`[data-node-id="${CSS.escape(this.node.id)}"] .gps-layout`)?.replaceWith(this.root);
    }

    /** The widget's text becomes the state's. */
    _read() {
        if (this.edits.value === this._seen) return;
        this._seen = this.edits.value;
        this.pointer.forget();
        this.state.setText(this._seen);
        this._redraw();
    }

    /** The state's text becomes the widget's: after the user has done something, and only then. */
    _write(moving = false) {
        this._read(); // what came from outside in between goes first
        this._redraw(moving);
        if (this._seen === this.state.text) return;
        this._seen = this.edits.value = this.state.text;
        app.graph.setDirtyCanvas(true, true);
        // Marks the workflow as changed; its own undo then knows of this change, too.
        const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
        tracker?.captureCanvasState ? tracker.captureCanvasState() : tracker?.checkState?.();
    }

    _redraw(moving = false) {
        this._stale = true;
        this._full ||= !moving;
        this._describe();
    }

    _draw() {
        if (!this._stale) return;
        this._zoom = this.view.zoom;
        this.view.draw(this.state, this.pointer.hover, this.pointer.frame, this.pointer.box, !this._full);
        this._full = this._stale = false;
    }

    _describe() {
        const {state} = this, {changed, deleted, added} = state.counts(), chosen = state.selected.size;
        const done = [[changed, "changed"], [deleted, "deleted"], [added, "added"]].filter(([count]) => count);
        const parts = done.map(([count, what]) => `${count} ${what}`);
        let text = parts.join(", ");
        if (state.geometry) {
            const count = state.items.length;
            const edits = state.misfit ? "edits not applied" : text || "no edits";
            text = `${count} token${count === 1 ? "" : "s"} · ${chosen} selected · ${edits}`;
        }
        if (this.counts.textContent !== text) this.counts.textContent = text;
        this.tip.textContent = !state.editable
            ? ""
            : chosen ? "Arrow keys nudge, Delete deletes" : "Shift-drag for a box, double-click to add";
        this.hint.hidden = Boolean(state.geometry);
        const notice = NOTICES[state.misfit] ?? "";
        if (this.noticeText.textContent !== notice) this.noticeText.textContent = notice; // screen readers read it once
        this.notice.hidden = !notice;
        this.buttons.adopt.hidden = state.misfit !== "layout";
        this.buttons.add.disabled = !state.editable || !state.items.length;
        this.buttons.delete.disabled = !chosen;
        this.buttons.undo.disabled = !state.canUndo;
        this.buttons.redo.disabled = !state.canRedo;
        this.buttons.reset.disabled = !state.text;
    }

    // ---- what people do ----

    _act(what) {
        const {state} = this;
        this._read();
        this.pointer.cancel();
        this.pointer.hover = null;
        if (what === "add") this._addCopies();
        if (what === "delete") state.deleteSelected();
        if (what === "undo") state.undo();
        if (what === "redo") state.redo();
        if (what === "reset") state.reset();
        if (what === "adopt") state.adopt();
        this._write();
    }

    /** Copies of the selection beside it; without one, of the token nearest to the middle. */
    _addCopies() {
        const {state} = this, shift = COPY_SHIFT_PX / this.view.layout().scale;
        const [rows, columns] = this.view.imageSize, chosen = state.selection();
        const sources = chosen.length ? chosen : [state.nearest((columns - 1) / 2, (rows - 1) / 2)];
        state.add(sources, shift, shift);
    }

    _key(event) {
        const command = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
        if (command && !event.altKey) {
            // Ctrl+Enter and all others are ComfyUI's; so are these two where a button has the focus.
            const inStage = event.target === this.keyboard;
            if (key === "a") this._selectAll();
            else if (inStage && key === "z") this._act(event.shiftKey ? "redo" : "undo");
            else if (inStage && key === "y" && !event.shiftKey) this._act("redo");
            else return;
        } else if (!event.altKey) {
            if (key === "delete" || key === "backspace") this._act("delete");
            else if (key === "escape") this._escape();
            else if (key.startsWith("arrow")) this._nudge(key, event.shiftKey ? LONG_NUDGE_PX : NUDGE_PX);
            else {
                event.stopPropagation(); // plain keys are shortcuts of ComfyUI's
                return;
            }
        } else return;
        event.preventDefault();
        event.stopPropagation();
    }

    _selectAll() {
        if (this.state.editable) this.state.selected = new Set(this.state.items);
        this._redraw();
    }

    _escape() {
        if (!this.pointer.cancel()) this.state.selected = new Set();
        this._redraw();
    }

    _nudge(key, px) {
        const dx = {arrowleft: -px, arrowright: px}[key] ?? 0, dy = {arrowup: -px, arrowdown: px}[key] ?? 0;
        this._read();
        this.state.nudge(dx, dy);
        this._write();
    }

    // ---- making it ----

    _build() {
        this.root = element("div", "gps-layout");
        const tools = element("div", "gps-layout-tools", {role: "toolbar", ariaLabel: "Gaussians"});
        this.buttons = {
            add: this._button("add", "Add", "Add copies of the selected Gaussians (or double-click)"),
            delete: this._button("delete", "Delete", "Delete the selected Gaussians (Delete)"),
            undo: this._button("undo", "Undo", "Undo (Ctrl+Z)"),
            redo: this._button("redo", "Redo", "Redo (Ctrl+Shift+Z or Ctrl+Y)"),
            reset: this._button("reset", "Reset", "Forget all edits"),
            adopt: this._button("adopt", "Apply anyway", "Apply the edits to this layout"),
        };
        const {add, delete: remove, undo, redo, reset} = this.buttons;
        tools.append(add, remove, element("div", "gps-layout-gap"), undo, redo, reset);
        this.stage = element("div", "gps-layout-stage");
        this.canvas = element("canvas", "");
        // A text field owns the keys: that is what ComfyUI's shortcuts, Delete and Ctrl+Z among them, keep away from.
        this.keyboard = element("textarea", "", {
            readOnly: true, ariaLabel: "Gaussians: arrow keys move the selected ones, Delete deletes them",
        });
        this.hint = element("div", "gps-layout-hint", {textContent: "Run the workflow to see its Gaussians here."});
        this.notice = element("div", "gps-layout-notice", {role: "alert"});
        this.noticeText = element("span", "");
        this.notice.append(this.noticeText, this.buttons.adopt);
        this.stage.append(this.keyboard, this.canvas, this.hint, this.notice);
        this.counts = element("span", "gps-layout-counts", {ariaLive: "polite"});
        this.tip = element("span", "gps-layout-tip");
        const status = element("div", "gps-layout-status");
        status.append(this.counts, this.tip);
        this.root.append(tools, this.stage, status);
        // Focus stays where the keys are.
        this.canvas.addEventListener("pointerdown", () => this.keyboard.focus({preventScroll: true}));
        this.root.addEventListener("pointerdown", () => this._read(), {capture: true});
        this.canvas.addEventListener("mousedown", (event) => event.preventDefault());
        this.root.addEventListener("contextmenu", (event) => event.preventDefault());
    }

    _button(name, label, tooltip) {
        const icon = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
        const button = element("button", `gps-layout-${name}`, {type: "button", title: tooltip, ariaLabel: tooltip});
        button.innerHTML = `${icon}<span>${label}</span>`;
        button.addEventListener("click", () => {
            this._act(name);
            this.keyboard.focus({preventScroll: true});
        });
        return button;
    }

    _hide(widget) {
        widget.hidden = true;
        widget.options = {...widget.options, hidden: true};
        widget.computeSize = () => [0, -4]; // the gap that the layout adds to each
    }

    /** The wheel zooms the graph and the middle button moves it, as everywhere else. */
    _leaveToGraph() {
        this.root.addEventListener("wheel", (event) => app.canvas.processMouseWheel(event));
        const middle = (handler, held) => (event) => held(event) && app.canvas[handler](event);
        this.root.addEventListener("pointerdown", middle("processMouseDown", (event) => event.button === 1));
        this.root.addEventListener("pointermove", middle("processMouseMove", (event) => event.buttons & 4));
        this.root.addEventListener("pointerup", middle("processMouseUp", (event) => event.button === 1));
    }
}

/** What outputs are kept under: the node's id, and before it the subgraph's where it lies in one. */
function locator(node) {
    const {graph} = node;
    return !graph?.rootGraph || graph === graph.rootGraph ? String(node.id) : `${graph.id}:${node.id}`;
}

function chain(node, method, added) {
    const before = node[method];
    node[method] = function (...given) {
        const result = before?.apply(this, given);
        added(...given);
        return result;
    };
}

app.registerExtension({
    name: "gpstoken.layout_editor",
    setup() {
        document.head.append(element("style", "", {textContent: STYLE}));
    },
    nodeCreated(node) {
        if (node.comfyClass !== NODE) return;
        const editor = new LayoutEditor(node);
        node.setSize([Math.max(node.size[0], NODE_SIZE[0]), Math.max(node.size[1], NODE_SIZE[1])]);
        chain(node, "onExecuted", (output) => output?.layout_editor && editor.show(output.layout_editor[0]));
        chain(node, "onRemoved", () => editor.remove());
    },
});
