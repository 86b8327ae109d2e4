"""When chunks are denoised and how: schedules, plans, solvers and the loop over rows. It knows neither networks nor policies."""
