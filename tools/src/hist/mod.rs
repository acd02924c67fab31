//! Latency histograms for people: tables, plots and files.

pub mod payload;
