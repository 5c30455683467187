// SPDX-License-Identifier: Apache-2.0
//! Software floating point (f32, f64 and x87 extended), exact on every host.
