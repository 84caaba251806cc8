//! The picture of `spm run --svg`: RAM, demand and budget over time, and below them what the program lost.

use plotters::prelude::*;

use super::course::Sample;
use crate::size::human;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 560;
/// Height of the upper part.
const MEMORY_HEIGHT: u32 = 380;
const DEMAND: RGBColor = RGBColor(0x9a, 0xa5, 0xb1);
const LIMIT: RGBColor = RGBColor(0xb7, 0x62, 0x1b);
const USED: RGBColor = RGBColor(0x2b, 0x6c, 0xb0);
const LOST: RGBColor = RGBColor(0xa8, 0x45, 0x2c);

/// Draws `samples`: the text of an SVG file. `allowed` is the slow-down that an automatic budget may cost, in per cent.
///
/// # Errors
/// The picture cannot be laid out.
pub fn draw(title: &str, samples: &[Sample], allowed: Option<f64>) -> anyhow::Result<String> {
    let mut text = String::new();
    paint(&mut text, title, samples, allowed).map_err(|error| anyhow::anyhow!("the picture: {error}"))?;
    Ok(text)
}

type Painted<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn paint<'a>(to: &'a mut String, title: &str, samples: &[Sample], allowed: Option<f64>) -> Painted<'a> {
    let area = SVGBackend::with_string(to, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(MEMORY_HEIGHT);
    let end = samples.last().map_or(1.0, |sample| sample.seconds).max(0.1);
    // A budget far above what is used says nothing, and would press the rest flat.
    let most = samples.iter().map(|sample| sample.used_bytes.max(sample.demand_bytes)).max().unwrap_or(0).max(1);
    let top = most.saturating_add(most / 8);
    let mut memory = ChartBuilder::on(&upper)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0..top)?;
    memory
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .y_label_formatter(&|bytes| human(*bytes))
        .x_desc("seconds")
        .draw()?;
    let mut line = |name: &str, colour: RGBColor, points: Vec<(f64, u64)>| -> Painted<'a> {
        memory
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        Ok(())
    };
    let of = |value: fn(&Sample) -> u64| samples.iter().map(|sample| (sample.seconds, value(sample))).collect();
    line("would take", DEMAND, of(|sample| sample.demand_bytes))?;
    let limits = samples.iter().filter_map(|sample| Some((sample.seconds, sample.limit_bytes?.min(top))));
    line("budget", LIMIT, limits.collect())?;
    line("takes", USED, of(|sample| sample.used_bytes))?;
    memory.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(DEMAND).draw()?;

    let worst = samples.iter().map(|sample| sample.slowdown_percent).fold(0.0, f64::max);
    let worst = worst.max(allowed.unwrap_or(0.0) * 1.5).max(1.0);
    let mut lost = ChartBuilder::on(&lower)
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..worst * 1.1)?;
    lost.configure_mesh()
        .light_line_style(TRANSPARENT)
        .y_labels(5)
        .y_label_formatter(&|value| format!("{value:.0}%"))
        .y_desc("lost")
        .draw()?;
    let points = samples.iter().map(|sample| (sample.seconds, sample.slowdown_percent));
    lost.draw_series(AreaSeries::new(points, 0.0, LOST.mix(0.3)).border_style(LOST.stroke_width(1)))?;
    if let Some(allowed) = allowed {
        lost.draw_series(LineSeries::new([(0.0, allowed), (end, allowed)], LIMIT.stroke_width(1)))?;
    }
    area.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_any_length_can_be_drawn() {
        let sample = |seconds: f64, bytes| Sample {
            seconds,
            used_bytes: bytes,
            demand_bytes: bytes * 2,
            limit_bytes: (bytes > 5).then_some(bytes * 1000),
            slowdown_percent: seconds,
        };
        let many: Vec<_> = (0..4096).map(|at| sample(f64::from(at), 1 << (at % 40))).collect();
        for samples in [&[][..], &many[..1], &many[..2], &many] {
            let mut text = String::new();
            paint(&mut text, "a <b> & \"c\"", samples, Some(5.0)).expect("a picture");
            assert!(text.contains("would take") && text.contains("a &lt;b&gt; &amp;"), "{text:.300}");
        }
    }
}
