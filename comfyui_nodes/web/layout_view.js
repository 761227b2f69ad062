// What the Layout Editor draws on its canvas: the picture, the ellipses, the selection's frame and handles.

import {area, ellipse, ELLIPSE_LEVEL, framePoint} from "./gaussian_geometry.js";

const MARGIN = 26; // CSS pixels around the picture, where handles of its border can be reached
const GROUND = "#101116";
const PICTURE_SHADE = "rgba(0, 0, 0, 0.35)"; // so that thin lines can be seen
const EMPTY_PICTURE = "#05060c";
const LIGHT = "#ffffff";
const ACCENT = "#1f6feb";
// By size, from small Gaussians to large: hot where the picture is busy, cool where it is calm.
const SIZE_COLORS = ["#fffbd6", "#ffdd4a", "#ff9a5c", "#ff7ad9", "#b9a8ff", "#66d0ff", "#5cffe4"];
const SMALLEST_OCTAVE = -1.6, LARGEST_OCTAVE = 2.6; // log2 of a Gaussian's width over the mean of N equal ones

const HANDLE_SIDE = 8;
const ROTATE_DISTANCE = 18;
const SCALE_HANDLES = [[-1, -1], [0, -1], [1, -1], [1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0]];

export class LayoutView {
    constructor(canvas) {
        this.canvas = canvas;
        this.imageSize = null; // [height, width]
        this.background = null; // an image element, or null
        this._still = document.createElement("canvas"); // all that does not move during a drag
    }

    /** How large the canvas is shown against its CSS size: the graph's zoom. */
    get zoom() {
        return this.canvas.getBoundingClientRect().width / this.canvas.clientWidth || 1;
    }

    /** What a line or handle of one CSS pixel measures; smaller graphs get thicker ones. */
    get unit() {
        return Math.min(2, Math.max(0.6, 1 / this.zoom));
    }

    /** CSS pixels per pixel of the picture, and where its top left corner is. */
    layout() {
        const {clientWidth: width, clientHeight: height} = this.canvas;
        const [imageHeight, imageWidth] = this.imageSize;
        const fit = Math.min((width - 2 * MARGIN) / imageWidth, (height - 2 * MARGIN) / imageHeight);
        const scale = Math.max(fit, 1e-3);
        return {scale, left: (width - imageWidth * scale) / 2, top: (height - imageHeight * scale) / 2};
    }

    /** A point of the picture on the canvas; pixel i is centred at i. */
    toCanvas(x, y) {
        const {scale, left, top} = this.layout();
        return [left + (x + 0.5) * scale, top + (y + 0.5) * scale];
    }

    toPicture(x, y) {
        const {scale, left, top} = this.layout();
        return [(x - left) / scale - 0.5, (y - top) / scale - 0.5];
    }

    /** Where a pointer event is on the canvas, in its CSS pixels. */
    eventPoint(event) {
        const box = this.canvas.getBoundingClientRect();
        return [(event.clientX - box.left) / this.zoom, (event.clientY - box.top) / this.zoom];
    }

    /** Handles of a frame on the canvas: [{kind: "scale" or "rotate", u, v, x, y}]. */
    handles(frame) {
        if (!frame) return [];
        const {scale} = this.layout(), gap = 4 * this.unit; // small ellipses stay visible inside their handles
        const roomy = {...frame, halfX: frame.halfX + gap / scale, halfY: frame.halfY + gap / scale};
        const found = SCALE_HANDLES.map(([u, v]) => {
            const [x, y] = this.toCanvas(...framePoint(roomy, u, v));
            return {kind: "scale", u, v, x, y};
        });
        const stem = 1 + (ROTATE_DISTANCE * this.unit) / (roomy.halfY * scale);
        const [above, below] = [-stem, stem].map((v) => {
            const [x, y] = this.toCanvas(...framePoint(roomy, 0, v));
            return {kind: "rotate", u: 0, v, x, y};
        });
        const {clientWidth: width, clientHeight: height} = this.canvas;
        const reachable = above.x > 0 && above.x < width && above.y > 0 && above.y < height;
        found.push(reachable ? above : below);
        return found;
    }

    /**
     * Draws everything.
     * @param state the LayoutState.
     * @param hover the item under the pointer, or null.
     * @param frame of the selection, or null.
     * @param box corners [x0, y0, x1, y1] on the canvas of a box that is being drawn, or null.
     * @param moving whether only the selection differs from what was drawn last.
     */
    draw(state, hover, frame, box, moving) {
        if (!this.canvas.clientWidth || !this.canvas.clientHeight) return;
        const ratio = (window.devicePixelRatio || 1) * Math.min(4, Math.max(1, this.zoom));
        const width = Math.round(this.canvas.clientWidth * ratio), height = Math.round(this.canvas.clientHeight * ratio);
        const resized = this._still.width !== width || this._still.height !== height;
        if (resized || !moving) this._drawStill(state, ratio, width, height);
        if (this.canvas.width !== width) this.canvas.width = width;
        if (this.canvas.height !== height) this.canvas.height = height;
        const context = this.canvas.getContext("2d");
        context.setTransform(1, 0, 0, 1, 0, 0);
        context.drawImage(this._still, 0, 0);
        if (!this.imageSize) return;
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        const selection = state.selection(), line = this._line(state);
        this._ellipses(context, selection, 3.6 * line, LIGHT);
        this._ellipses(context, selection, 1.8 * line, ACCENT, "rgba(31, 111, 235, 0.25)");
        if (hover && !state.selected.has(hover)) this._ellipses(context, [hover], 2 * line, LIGHT);
        if (frame) this._drawFrame(context, frame);
        if (box) this._drawBox(context, box);
    }

    _drawStill(state, ratio, width, height) {
        this._still.width = width;
        this._still.height = height;
        const context = this._still.getContext("2d");
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        context.fillStyle = GROUND;
        context.fillRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
        if (!this.imageSize) return;
        const {scale, left, top} = this.layout(), [rows, columns] = this.imageSize;
        context.fillStyle = EMPTY_PICTURE;
        context.fillRect(left, top, columns * scale, rows * scale);
        if (this.background) {
            context.imageSmoothingEnabled = scale * ratio < 3; // small pictures keep their pixels visible
            context.drawImage(this.background, left, top, columns * scale, rows * scale);
            context.fillStyle = PICTURE_SHADE;
            context.fillRect(left, top, columns * scale, rows * scale);
        }
        this._drawUnselected(context, state);
    }

    _drawUnselected(context, state) {
        const still = state.bySize().filter((item) => !state.selected.has(item));
        const meanWidth = this._meanWidth(state), line = this._line(state);
        // One stroke for each colour, large ones first.
        const groups = SIZE_COLORS.map(() => []);
        for (const item of still) {
            const octave = Math.log2((Math.sqrt(area(item.gaussian)) * 2 * ELLIPSE_LEVEL) / meanWidth);
            const share = (octave - SMALLEST_OCTAVE) / (LARGEST_OCTAVE - SMALLEST_OCTAVE);
            const group = Math.round(Math.min(1, Math.max(0, share)) * (groups.length - 1));
            groups[group].push(item);
        }
        if (this.background) this._ellipses(context, still, 2.4 * line, "rgba(0, 0, 0, 0.4)");
        for (let group = groups.length - 1; group >= 0; group--) {
            const fill = this.background ? null : `${SIZE_COLORS[group]}18`;
            this._ellipses(context, groups[group], line, SIZE_COLORS[group], fill);
        }
        this._dots(context, still.filter((item) => item.edited));
    }

    /** The width that N equal ellipses would have, in pixels of the picture. */
    _meanWidth({items}) {
        return Math.sqrt((this.imageSize[0] * this.imageSize[1]) / Math.max(1, items.length));
    }

    /** Width of the outlines: thinner where there are many. */
    _line(state) {
        return Math.min(1.4, Math.max(0.9, (this._meanWidth(state) * this.layout().scale) / 16)) * this.unit;
    }

    /** Strokes, and fills if there is a colour for it, ellipses in one go. */
    _ellipses(context, items, line, stroke, fill = null) {
        if (items.length === 0) return;
        const {scale, left, top} = this.layout();
        context.beginPath();
        for (const {gaussian} of items) {
            const {radiusX, radiusY, angle} = ellipse(gaussian);
            const x = left + (gaussian.x + 0.5) * scale, y = top + (gaussian.y + 0.5) * scale;
            context.moveTo(x + radiusX * scale * Math.cos(angle), y + radiusX * scale * Math.sin(angle));
            context.ellipse(x, y, radiusX * scale, radiusY * scale, angle, 0, 2 * Math.PI);
        }
        if (fill) {
            context.fillStyle = fill;
            context.fill();
        }
        context.lineWidth = line;
        context.strokeStyle = stroke;
        context.stroke();
    }

    /** Marks what was changed or added. */
    _dots(context, items) {
        const radius = 1.8 * this.unit;
        context.beginPath();
        for (const {gaussian} of items) {
            const [x, y] = this.toCanvas(gaussian.x, gaussian.y);
            context.moveTo(x + radius, y);
            context.arc(x, y, radius, 0, 2 * Math.PI);
        }
        context.fillStyle = LIGHT;
        context.fill();
    }

    _drawFrame(context, frame) {
        const handles = this.handles(frame), corners = handles.filter(({u, v}) => u && v), unit = this.unit;
        const rotate = handles.at(-1), side = handles[rotate.v < 0 ? 1 : 5];
        context.beginPath();
        corners.forEach(({x, y}) => context.lineTo(x, y));
        context.closePath();
        context.moveTo(side.x, side.y);
        context.lineTo(rotate.x, rotate.y);
        context.lineWidth = unit;
        context.strokeStyle = "rgba(255, 255, 255, 0.65)";
        context.stroke();
        context.fillStyle = ACCENT;
        context.strokeStyle = LIGHT;
        context.lineWidth = 1.4 * unit;
        for (const {kind, x, y} of handles) {
            const half = (HANDLE_SIDE / 2) * unit;
            context.beginPath();
            if (kind === "rotate") {
                context.arc(x, y, half * 1.2, 0, 2 * Math.PI);
            } else {
                context.translate(x, y);
                context.rotate(frame.angle);
                context.rect(-half, -half, 2 * half, 2 * half);
                context.rotate(-frame.angle);
                context.translate(-x, -y);
            }
            context.fill();
            context.stroke();
        }
    }

    _drawBox(context, [x0, y0, x1, y1]) {
        context.fillStyle = "rgba(31, 111, 235, 0.2)";
        context.fillRect(x0, y0, x1 - x0, y1 - y0);
        context.lineWidth = this.unit;
        context.strokeStyle = "#6ea8ff";
        context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
}
