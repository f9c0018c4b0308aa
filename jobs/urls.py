"""The URLs of all pages. The live stream `/jobs/<id>/stream` is not a Django view: see `jobs.views.live`."""

from __future__ import annotations

from django.urls import path

from jobs.views import (
    dataset_rows,
    datasets,
    estimates,
    jobs,
    live,
    models,
    notifications,
    objects,
    playground,
    uploads,
)

app_name = "jobs"

urlpatterns = [
    path("datasets/", datasets.index, name="datasets"),
    path("datasets/upload/", datasets.upload, name="upload"),
    path("datasets/uploads/", uploads.begin, name="begin_upload"),
    path("datasets/uploads/<str:upload_id>/parts/<int:number>/", uploads.part, name="upload_part"),
    path("datasets/uploads/<str:upload_id>/links/", uploads.links, name="upload_links"),
    path("datasets/uploads/<str:upload_id>/complete/", uploads.complete, name="complete_upload"),
    path("datasets/uploads/<str:upload_id>/cancel/", uploads.cancel, name="cancel_upload"),
    path("datasets/<str:dataset_id>/", datasets.detail, name="dataset"),
    path("datasets/<str:dataset_id>/report/", datasets.report, name="dataset_report"),
    path("datasets/<str:dataset_id>/columns/", datasets.columns, name="dataset_columns"),
    path("datasets/<str:dataset_id>/row/", datasets.row, name="dataset_row"),
    path("datasets/<str:dataset_id>/read-as/", datasets.read_as, name="read_as"),
    path("datasets/<str:dataset_id>/delete/", datasets.delete, name="delete_dataset"),
    path("datasets/<str:dataset_id>/fix/", datasets.fix, name="fix_dataset"),
    path("datasets/<str:dataset_id>/rows/", dataset_rows.index, name="dataset_rows"),
    path("datasets/<str:dataset_id>/rows/<str:row>/", dataset_rows.edit, name="edit_row"),
    path("datasets/<str:dataset_id>/draft/", dataset_rows.draft, name="row_draft"),
    path("datasets/<str:dataset_id>/merge/", dataset_rows.merge, name="dataset_merge"),
    path("jobs/", jobs.index, name="jobs"),
    path("jobs/new/", jobs.new, name="new_job"),
    path("jobs/new/estimate/", jobs.estimate, name="estimate"),
    path("jobs/new/base/", jobs.add_base, name="add_base"),
    path("jobs/new/base/remove/", jobs.remove_base, name="remove_base"),
    path("jobs/new/count/", jobs.count_tokens, name="count_tokens"),
    path("jobs/estimates/", estimates.index, name="estimates"),
    path("jobs/<str:job_id>/", jobs.detail, name="job"),
    path("jobs/<str:job_id>/edit/", jobs.edit, name="edit_job"),
    path("jobs/<str:job_id>/actions/", jobs.actions, name="job_actions"),
    path("jobs/<str:job_id>/pause/", jobs.pause, name="pause_job"),
    path("jobs/<str:job_id>/resume/", jobs.resume, name="resume_job"),
    path("jobs/<str:job_id>/cancel/", jobs.cancel, name="cancel_job"),
    path("jobs/<str:job_id>/retry/", jobs.retry, name="retry_job"),
    path("jobs/<str:job_id>/rename/", jobs.rename, name="rename_job"),
    path("jobs/<str:job_id>/delete/", jobs.delete, name="delete_job"),
    path("jobs/<str:job_id>/live", live.poll, name="job_live"),
    path("jobs/<str:job_id>/metrics.csv", jobs.metrics_csv, name="job_csv"),
    path("jobs/<str:job_id>/log.txt", jobs.log_text, name="job_log"),
    path("models/", models.index, name="models"),
    # The ID of a model fine-tuned from a Hub model has a slash (ft:owner/name:…), so its page comes last.
    path("models/<path:model_id>/download.zip", models.download, name="download_model"),
    path("models/<path:model_id>/names/", models.aliases, name="model_names"),
    path("models/<path:model_id>/delete/", models.delete, name="delete_model"),
    path("models/<path:model_id>/", models.detail, name="model"),
    path("notifications/", notifications.page, name="notifications"),
    path("notifications/email/", notifications.email, name="notify_by_email"),
    path("notifications/<str:webhook_endpoint_id>/test/", notifications.test, name="test_webhook"),
    path("notifications/<str:webhook_endpoint_id>/delete/", notifications.delete, name="delete_webhook"),
    path("objects/<str:token>/<str:filename>", objects.download, name="object"),
    path("playground/", playground.page, name="playground"),
    path("playground/stream", playground.stream, name="playground_stream"),
]
