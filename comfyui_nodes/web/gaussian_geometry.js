// Mathematics of Gaussians for the Layout Editor: pure functions, in pixels of the picture.
//
// A Gaussian is {x, y, xx, xy, yy}: its centre (pixel i is centred at i, y grows downwards) and its covariance. Tokens
// hold [sigma_x, sigma_y, rho, x, y] in canvas coordinates, in which -1 and 1 are the centres of the first and last
// pixel. A linear map is [a, b, c, d] for the matrix [[a, b], [c, d]].

export const ELLIPSE_LEVEL = 1.5; // radius of the ellipses in sigmas, as the package draws them elsewhere

// Bounds of gpstoken_diffusers/token_editing.py, and how far a centre may leave the canvas.
const MIN_SIGMA = 1e-5;
const MAX_SIGMA = 10;
const MAX_ABS_CORRELATION = 1 - 1e-6;
const MAX_ABS_CENTER = 1.5;

const halfExtent = (side) => Math.max(side - 1, 1) / 2;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const rounded = (value) => Number(value.toFixed(6));

/** Token geometry to a Gaussian; canvasSize is [height, width]. */
export function toPixels([sigmaX, sigmaY, rho, x, y], [height, width]) {
    const halfX = halfExtent(width), halfY = halfExtent(height);
    const sx = sigmaX * halfX, sy = sigmaY * halfY;
    return {x: (x + 1) * halfX, y: (y + 1) * halfY, xx: sx * sx, xy: rho * sx * sy, yy: sy * sy};
}

/** The way back, within the bounds and rounded to six digits. */
export function fromPixels({x, y, xx, xy, yy}, [height, width]) {
    const halfX = halfExtent(width), halfY = halfExtent(height);
    const sx = Math.sqrt(xx), sy = Math.sqrt(yy);
    const rho = sx * sy > 0 ? xy / (sx * sy) : 0;
    return [
        clamp(rounded(sx / halfX), MIN_SIGMA, MAX_SIGMA),
        clamp(rounded(sy / halfY), MIN_SIGMA, MAX_SIGMA),
        clamp(rounded(rho), -MAX_ABS_CORRELATION, MAX_ABS_CORRELATION),
        clamp(rounded(x / halfX - 1), -MAX_ABS_CENTER, MAX_ABS_CENTER),
        clamp(rounded(y / halfY - 1), -MAX_ABS_CENTER, MAX_ABS_CENTER),
    ];
}

/** The ellipse of a Gaussian: radii, and the angle of the first, which is the one that lies closer to the x axis. */
export function ellipse({xx, xy, yy}) {
    const middle = (xx + yy) / 2, spread = Math.hypot((xx - yy) / 2, xy);
    const large = Math.sqrt(middle + spread) * ELLIPSE_LEVEL;
    const small = Math.sqrt(Math.max(middle - spread, 0)) * ELLIPSE_LEVEL;
    const angle = spread > 1e-9 * middle ? Math.atan2(2 * xy, xx - yy) / 2 : 0; // of the longer axis
    if (Math.abs(angle) <= Math.PI / 4 + 1e-9) return {radiusX: large, radiusY: small, angle};
    return {radiusX: small, radiusY: large, angle: angle > 0 ? angle - Math.PI / 2 : angle + Math.PI / 2};
}

/** Square root of the covariance's determinant: an ellipse's area goes with it. */
export function area({xx, xy, yy}) {
    return Math.sqrt(Math.max(xx * yy - xy * xy, 0));
}

/** Whether a point lies in the ellipse, enlarged by `slack` pixels so that thin ones can be hit. */
export function contains(gaussian, px, py, slack) {
    const {radiusX, radiusY, angle} = ellipse(gaussian);
    const dx = px - gaussian.x, dy = py - gaussian.y, cos = Math.cos(angle), sin = Math.sin(angle);
    return Math.hypot((dx * cos + dy * sin) / (radiusX + slack), (dy * cos - dx * sin) / (radiusY + slack)) <= 1;
}

/** Centre c -> p + M (c - p), covariance S -> M S M^T. */
export function transformed({x, y, xx, xy, yy}, [a, b, c, d], px, py) {
    const dx = x - px, dy = y - py;
    return {
        x: px + a * dx + b * dy,
        y: py + c * dx + d * dy,
        xx: a * a * xx + 2 * a * b * xy + b * b * yy,
        xy: a * c * xx + (a * d + b * c) * xy + b * d * yy,
        yy: c * c * xx + 2 * c * d * xy + d * d * yy,
    };
}

export function rotation(angle) {
    return [Math.cos(angle), -Math.sin(angle), Math.sin(angle), Math.cos(angle)];
}

/** Stretches along the axes of a frame that is turned by an angle: R diag(factorX, factorY) R^T. */
export function stretch(factorX, factorY, angle) {
    const cos = Math.cos(angle), sin = Math.sin(angle), shared = (factorX - factorY) * cos * sin;
    return [factorX * cos * cos + factorY * sin * sin, shared, shared, factorX * sin * sin + factorY * cos * cos];
}

/** The box around Gaussians that handles sit on: for one its own axes, for several upright. Null for none. */
export function frameOf(gaussians) {
    if (gaussians.length === 0) return null;
    if (gaussians.length === 1) {
        const {radiusX, radiusY, angle} = ellipse(gaussians[0]);
        return {x: gaussians[0].x, y: gaussians[0].y, halfX: radiusX, halfY: radiusY, angle};
    }
    let left = Infinity, right = -Infinity, top = Infinity, bottom = -Infinity;
    for (const {x, y, xx, yy} of gaussians) {
        const reachX = ELLIPSE_LEVEL * Math.sqrt(xx), reachY = ELLIPSE_LEVEL * Math.sqrt(yy);
        left = Math.min(left, x - reachX);
        right = Math.max(right, x + reachX);
        top = Math.min(top, y - reachY);
        bottom = Math.max(bottom, y + reachY);
    }
    return {
        x: (left + right) / 2, y: (top + bottom) / 2, halfX: (right - left) / 2, halfY: (bottom - top) / 2, angle: 0,
    };
}

/** A point of a frame, in units of its half sides: (1, 0) is the middle of its right side. */
export function framePoint({x, y, halfX, halfY, angle}, u, v) {
    const dx = u * halfX, dy = v * halfY, cos = Math.cos(angle), sin = Math.sin(angle);
    return [x + dx * cos - dy * sin, y + dx * sin + dy * cos];
}
